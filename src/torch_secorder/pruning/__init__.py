r"""The saliency of weights and channels, and pruning those with the least.

Setting weight i to zero is the error ``delta_i = -w_i``, whose predicted Kullback-Leibler divergence per sample, to second
order and without cross terms, is the saliency :math:`\tfrac12 F_{ii} w_i^2` of optimal brain damage. For a channel, it is
half the Fisher information of a gate that multiplies the channel; for a head of a transformer, that of a gate on its channels.
"""

from torch_secorder.pruning.gates import Gates, GateSaliency
from torch_secorder.pruning.importance import GroupImportance
from torch_secorder.pruning.masks import prune
from torch_secorder.pruning.saliency import pruning_sensitivity, weight_saliency
from torch_secorder.pruning.top_k import top_k_mask

__all__ = ["GateSaliency", "Gates", "GroupImportance", "prune", "pruning_sensitivity", "top_k_mask", "weight_saliency"]
