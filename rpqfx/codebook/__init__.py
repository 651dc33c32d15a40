"""A matrix that is never stored: codebooks and codes, the products with it, and their gradients."""

from rpqfx.codebook.gradients import accumulate, collect, collect_sparse, contract_grads
from rpqfx.codebook.matrix import contract, contract_t, expand, lookup, range_of, select_sub_vectors, select_vectors
from rpqfx.codebook.signs import pack_signs, unpack_signs
from rpqfx.codebook.spec import CodebookSpec, GradScale, code_dtype, default_codebook_dim, nearest_divisor

__all__ = [
    "CodebookSpec",
    "GradScale",
    "accumulate",
    "code_dtype",
    "collect",
    "collect_sparse",
    "contract",
    "contract_grads",
    "contract_t",
    "default_codebook_dim",
    "expand",
    "lookup",
    "nearest_divisor",
    "pack_signs",
    "range_of",
    "select_sub_vectors",
    "select_vectors",
    "unpack_signs",
]
