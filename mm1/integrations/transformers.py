"""Use mm1's kernels in transformers: the mixture-of-experts MLP, and the patch embedding.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="mm1")
    model.set_experts_implementation("mm1")    # or later

    accelerate(model)    # vision embeddings of SigLIP 2 and Qwen-VL, in place
    restore(model)       # undoes it

Weights are used in place, transposed or interleaved, without copies. Experts that moe_mlp cannot express run on
transformers' grouped_mm, with one warning. Interface: transformers 5, integrations/moe.py.
"""

import warnings
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mm1.integrations import embeddings
from mm1.integrations.swap import missing, restore, swap
from mm1.kernels.moe.activation import QUICK
from mm1.kernels.moe.experts import moe_mlp

__all__ = ["accelerate", "experts_forward", "register", "restore"]

ACTIVATIONS = {  # name of a class or function -> mm1's name
    "SiLU": "silu", "SiLUActivation": "silu", "silu": "silu", "QuickGELUActivation": "quick_gelu",
    "GELUActivation": "gelu", "GELU": "gelu", "gelu": "gelu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh", "AccurateGELUActivation": "gelu_tanh",
    "ReLU": "relu", "relu": "relu", "ReLUSquaredActivation": "relu2",
}  # fmt: skip


class Gate(NamedTuple):
    """Describe a method _apply_gate of transformers as settings of moe_mlp."""

    limit: str | None = None  # name of the module's attribute with the limit
    activation: str | None = None  # None: the activation of act_fn
    shift: float = 0.0
    alpha: str | None = None  # name of the module's attribute that must equal QUICK


GATES = {  # by class; the default method is Gate()
    "BeamExperts": Gate(),  # the default method, but in fp32, as mm1 always computes it
    "DeepseekV4Experts": Gate("limit"),
    "Glm5NextTextExperts": Gate("swiglu_limit", "silu"),
    "HYV4Experts": Gate("swiglu_limit", "silu"),
    "GptOssExperts": Gate("limit", "quick_gelu", 1.0, "alpha"),
    "OpenAIPrivacyFilterExperts": Gate("limit", "quick_gelu", 1.0, "alpha"),
    "MiniMaxM3VLExperts": Gate("swiglu_limit", "quick_gelu", 1.0, "swiglu_alpha"),
}


def register() -> None:
    """Register "mm1" as an experts implementation of transformers. Raises ImportError without transformers 5.

    A request for "mm1" then warns once for a mixture whose experts do not use that interface (Llama 4, DBRX).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise missing("transformers>=5", error) from error
    # warnings.warn breaks a graph; a function of constant result runs only while tracing. As a decorator this
    # would import dynamo at once.
    torch.compiler.assume_constant_result(_warn_once)
    ALL_EXPERTS_FUNCTIONS.register("mm1", experts_forward)
    _watch_requests()


def accelerate(model: nn.Module, *, still_images: bool = False) -> list[str]:
    """Swap the vision embeddings of a model in place; return the names of the swapped modules.

    These are SigLIP 2's embeddings, padded rows included, and the patch embedding of Qwen2-VL, 2.5-VL, 3-VL and of
    models that share its code, with Qwen3-VL's positions where the tower computes them. The original still computes
    the calls that the kernels cannot: replaced or quantized layers, hooks, precomputed interpolation, fp64.
    still_images: whether both temporal halves of every Qwen patch are equal, as its processor makes them for still
    images; the product then has half the depth, and would be wrong for a video.
    Call it before the model is sharded or compiled. Calling it again changes only still_images. Raises ImportError
    without transformers.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise missing("transformers>=5", error) from error
    return swap(model, partial(embeddings.choose, still_images=still_images))


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the output [T, D] of an experts module of transformers.

    hidden_states [T, D], top_k_index and top_k_weights [T, K].
    """
    settings = _settings(self)
    if isinstance(settings, str):
        from transformers.integrations.moe import grouped_mm_experts_forward

        _warn_once(f"{type(self).__name__} has {settings}, which mm1 does not compute: it runs on grouped_mm")
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    first, down = getattr(self, name), self.down_proj
    if self.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    biases = (getattr(self, f"{name}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    # x must not become integers before moe_mlp refuses weights that a quantizer packed into integers.
    x = hidden_states.to(down.dtype) if down.is_floating_point() else hidden_states
    y = moe_mlp(
        x, top_k_index, top_k_weights, first, down, gate_up_bias=biases[0],
        down_bias=biases[1], interleaved=self.has_gate and not self.is_concatenated, **settings,
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def _settings(experts: Any) -> dict[str, Any] | str:
    """Return moe_mlp's settings for a module, or a text that names the part that moe_mlp cannot express.

    Methods are recognised by name, because torch.compile can trace that.
    """
    if experts.has_post_expert_norm:
        return "a post_expert_norm"
    gate = Gate()
    if experts.has_gate and experts._apply_gate.__name__ != "_default_apply_gate":
        # A class that torch derives from it (FSDP, parametrizations) has another name.
        gate = next((GATES[kind.__name__] for kind in type(experts).__mro__ if kind.__name__ in GATES), None)
        if gate is None or not experts._apply_gate.__module__.startswith("transformers."):
            return "an _apply_gate of its own"
    if gate.alpha is not None and getattr(experts, gate.alpha) != QUICK:
        return f"an {gate.alpha} other than {QUICK}"
    activation = gate.activation or _activation(experts.act_fn)
    if activation is None:
        return f"activation {type(experts.act_fn).__name__}"
    limit = None if gate.limit is None else float(getattr(experts, gate.limit))
    return {"activation": activation, "limit": limit, "shift": gate.shift}


def _activation(act_fn: Any) -> str | None:
    name = type(act_fn).__name__ if isinstance(act_fn, nn.Module) else getattr(act_fn, "__name__", "")
    return "gelu_tanh" if getattr(act_fn, "approximate", "none") == "tanh" else ACTIVATIONS.get(name)


# Names that configurations use for the number of experts.
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@cache
def _watch_requests() -> None:
    """Make models warn if a request for "mm1" has no effect; transformers itself does not warn."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.get_correct_experts_implementation

    @wraps(original)
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        if requested_experts == "mm1":
            for model in self.modules():
                if isinstance(model, PreTrainedModel):
                    _warn_if_ignored(model)
        return original(self, requested_experts)

    PreTrainedModel.get_correct_experts_implementation = get_correct_experts_implementation


def _warn_if_ignored(model: Any) -> None:
    fields = getattr(model.config, "ffn_config", model.config)  # DBRX has it nested
    counts = [getattr(fields, name, None) for name in COUNTS]
    if any(isinstance(count, int) and count > 1 for count in counts) and not model._can_set_experts_implementation():
        _warn_once(
            f"the experts of {model.config.model_type} models do not use transformers' experts interface: "
            'experts_implementation="mm1" changes nothing there'
        )


WARNED: set[str] = set()  # messages of warnings that this process has shown


def _warn_once(message: str) -> None:
    if message not in WARNED:
        WARNED.add(message)
        warnings.warn(message, stacklevel=2)
