"""An operation in the middle of a model whose backward fails."""

import torch


class Fail(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("a backward that fails")
