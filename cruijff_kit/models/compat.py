"""Import torchtune, with workarounds for torchtune and torchao. No other module imports torchtune.

torchtune 0.6.1 is its last release. A replacement must provide the names that are imported here.
"""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    # torchao 0.16 warns at import that its C++ kernels are built for another torch; LoRA needs none of them.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    import torchao.quantization


def _make_stub(name: str):
    def raise_error(*args, **kwargs):
        raise NotImplementedError(f"torchao.quantization.{name} is gone; torchtune imports it but LoRA never calls it")

    return raise_error


# torchtune's quantisation module imports these two names, for recipes that we do not have.
for _name in ("int4_weight_only", "int8_dynamic_activation_int4_weight"):
    if not hasattr(torchao.quantization, _name):
        setattr(torchao.quantization, _name, _make_stub(_name))

# torchtune's RMSNorm computes in fp32 on purpose; at the first call torch warns that it is not the fused kernel.
warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight", category=UserWarning)

from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4  # noqa: E402
from torchtune.config import instantiate  # noqa: E402
from torchtune.config._utils import _get_component_from_path as get_component  # noqa: E402
from torchtune.models.llama3_1 import Llama3ScaledRoPE  # noqa: E402
from torchtune.modules import (  # noqa: E402
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import (  # noqa: E402
    DoRALinear,
    LoRALinear,
    disable_adapter,
    get_adapter_params,
    set_trainable_params,
)
from torchtune.training import (  # noqa: E402
    MODEL_KEY,
    ModelType,
    compile_model,
    get_act_offloading_ctx_manager,
    set_activation_checkpointing,
    set_default_dtype,
    set_seed,
)
from torchtune.training.metric_logging import (  # noqa: E402
    MLFlowLogger,
    TensorBoardLogger,
    WandBLogger,
    flatten_dict,
)

# torchtune logs every step of its set-up through its own handlers; cruijff_kit prints what matters of it.
for _name in [n for n in logging.root.manager.loggerDict if n.startswith("torchtune")]:
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = [
    "MLFlowLogger",
    "MODEL_KEY",
    "DoRALinear",
    "FeedForward",
    "Llama3ScaledRoPE",
    "LoRALinear",
    "ModelType",
    "MultiHeadAttention",
    "NF4Tensor",
    "RMSNorm",
    "RotaryPositionalEmbeddings",
    "TensorBoardLogger",
    "TiedLinear",
    "TransformerDecoder",
    "TransformerSelfAttentionLayer",
    "WandBLogger",
    "compile_model",
    "disable_adapter",
    "flatten_dict",
    "get_act_offloading_ctx_manager",
    "get_adapter_params",
    "get_component",
    "instantiate",
    "set_activation_checkpointing",
    "set_default_dtype",
    "set_seed",
    "set_trainable_params",
    "to_nf4",
]
