"""Cut a model into stages: find its layers, divide them evenly, and turn copies of the model into stages."""
