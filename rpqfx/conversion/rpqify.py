"""``rpqify`` quantizes weights as a policy alone says."""

from __future__ import annotations

from torch import nn

from rpqfx.conversion.rewritten import rewritten
from rpqfx.policies.policy import Decide, Policy
from rpqfx.reporting.progress import Progress


def rpqify(
    model: nn.Module,
    policy: Policy | Decide | None = None,
    *,
    inplace: bool = False,
    seed: int | None = None,
    progress: Progress | bool | None = None,
) -> nn.Module:
    """Returns a copy of a model, or with ``inplace`` the model itself, whose weights live in codebooks.

    Every Linear, Embedding, convolution, Bilinear, MultiheadAttention and recurrent layer, and every Parameter that a
    module uses in a product, a convolution or a lookup of its own, is held as a policy says. Classes, names, hooks,
    flags, methods and ties stay. What is not rewritten stays exactly as it was;
    [`report`][rpqfx.reporting.report.report] says why. The model is not run:
    [`convert`][rpqfx.conversion.convert.convert] fits codebooks to what it does with data, and
    [`check_outputs`][rpqfx.conversion.check.check_outputs] compares the result with the dense model.

    Args:
        model: Any module, on any device. Of a wrapped one (``torch.compile``, ``DataParallel``, ``AveragedModel``) the
            model within is rewritten, by the names that it has there, and wrapped again. On the meta device
            nothing is allocated; [`materialize`][rpqfx.storage.materialize.materialize] does that later.
        policy: A [`Policy`][rpqfx.policies.policy.Policy], or a callable from a site to a spec or a skip. It has to be
            given.
        inplace: Rewrite ``model`` itself. Otherwise it is left untouched, and the result shares no tensor with it.
        seed: Seeds fits, with 0 if left out, and codebooks that are drawn, which are drawn from torch's global
            generator if it is left out.
        progress: Called with (done, total, site name) after each site. True shows a line with the time left on
            standard error; False, or nothing, shows none.

    Where this raises anything, an interrupt (Ctrl-C) among it, ``model`` is as it was, also with ``inplace``, and so
    are torch's global generators.

    Returns:
        The rewritten model, of the same class, in the same mode.

    Raises:
        InputError: If ``model`` is not a module, or an argument would do nothing.
        RewriteError: If the model already has quantized weights, cannot be copied, is in
            ``DistributedDataParallel`` or FSDP (rewrite it before), or has been loaded in part (some weights are on the
            meta device, or offloaded by accelerate).
        PolicyError: If there is no policy, or it rewrites nothing or cannot be followed.
        CaptureError: If a lazy module has never run.
    """
    return rewritten("rpqify", model, policy, inplace=inplace, seed=seed, progress=progress)
