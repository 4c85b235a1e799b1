"""The face of `restow.torch.mixin`: the class that NeMo AutoModel's adapters inherit, under the module name
they use.
"""

from restow.torch.mixin import MoESplitExpertsStateDictMixin, materialized

__all__ = ["MoESplitExpertsStateDictMixin", "materialized"]
