r"""The predicted cost of rounding parameters, and the allocation of bits to them.

Rounding a parameter w to ``w + delta`` changes the model's prediction. To second order, the Kullback-Leibler divergence from
the prediction of the model to that of the rounded one, per sample and in nats, is

.. math:: \mathrm{KL} \approx \tfrac12\, \delta^\top F\, \delta \approx \tfrac12 \sum_i F_{ii}\, \delta_i^2 ,

with F the Fisher of the model's own prediction, averaged over samples. ``delta`` is not estimated: it is the actual rounding
error of the weights.
"""

from torch_secorder.quantization.allocation import allocate_bits, uniform_bits
from torch_secorder.quantization.rounding import quantized, rounded
from torch_secorder.quantization.sensitivity import quantization_sensitivity

__all__ = ["allocate_bits", "quantization_sensitivity", "quantized", "rounded", "uniform_bits"]
