"""How a mixture-of-experts model looks: find its MoE layers; read, slice and replace experts and routers.

Everything here works on any transformers v5 model that follows the fused-experts contract; what the contract cannot
say is in one table (`architectures`).
"""

from coterie.anatomy.experts import ExpertBank, ExpertWeights, is_experts_module
from coterie.anatomy.layers import MoELayer, any_moe_layers, decoder_layers, moe_layers
from coterie.anatomy.slicing import check_keep, narrowed, select, slice_names

__all__ = [
    "ExpertBank",
    "ExpertWeights",
    "MoELayer",
    "any_moe_layers",
    "check_keep",
    "decoder_layers",
    "is_experts_module",
    "moe_layers",
    "narrowed",
    "select",
    "slice_names",
]
