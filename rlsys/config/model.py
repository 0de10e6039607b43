"""The language model."""

from typing import Literal

from pydantic import Field

from rlsys.config.section import Section

Dtype = Literal["auto", "float32", "bfloat16"]


class ModelConfig(Section):
    """The language model that is trained."""

    path: str = Field(
        default="smollm2-135m",
        description="Model to train: a name from the catalogue (smollm2-135m, tiny, "
        "qwen2.5-math-1.5b), a Hugging Face Hub id, a local directory in Hugging Face format, or a "
        ".gguf file.",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        default="auto",
        description="Attention kernel of the trainer. auto: flash_attention_2 on a GPU where it is "
        "installed, else sdpa.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run the Python code that comes with a model or its tokenizer, with your "
        "rights, in every process that loads it. Read the code first.",
    )
