"""The language model."""

from typing import ClassVar, Literal

from pydantic import Field

from rlsys.config.section import Section

Dtype = Literal["auto", "float32", "bfloat16"]


class LoraConfig(Section):
    """Low-rank adapters: the trained part of a model whose own weights are frozen."""

    rank: int = Field(
        default=0,
        ge=0,
        description="Rank of the adapters of every trained model of the run (LoRA). 0: off, all "
        "weights are trained. See docs/lora.md.",
    )
    alpha: float = Field(
        default=32.0,
        gt=0,
        description="Scale of the adapters: their product is multiplied by alpha / rank.",
    )
    target_modules: tuple[str, ...] = Field(
        default=(),
        description="Linear layers of the decoder blocks that get adapters, by the last parts of "
        "their names: [q_proj, v_proj]. []: all of them.",
    )


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
    lora: LoraConfig = Field(default=LoraConfig(), description="Low-rank adapters.")


class SampledModelConfig(ModelConfig):
    """A model that is sampled from and not trained."""

    lora: ClassVar[LoraConfig] = LoraConfig()  # pyright: ignore
