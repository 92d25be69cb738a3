"""Search for topologies: every one that ``build`` accepts, which of them fit a model and a device, which are fastest.

Here, without torch: ``space`` (what to search), ``enumeration`` (every topology of it), ``hardware`` (devices and
networks) and ``paste`` (a topology as code). With torch: ``model`` (read on meta), ``tracing`` (count operators),
``profile`` (count a step), ``estimate`` (memory and time of a topology) and ``ranking`` (all of it together).
"""
