"""What `model.yaml` and `train.yaml` say of a jump."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mlff_engines.config import Config
from mlff_engines.models.jump import JumpConfig
from mlff_engines.units import length_unit


class JumpModelConfig(Config):
    """A file for `mlff kstep train --model`."""

    arch: Literal["painn", "torchmdnet_et"] = Field(
        "painn", description="encoder: PaiNN, or the equivariant transformer of TorchMD-Net, which must be installed"
    )
    hidden_channels: int = Field(64, ge=2, description="scalar and vector features of the encoder")
    num_layers: int = Field(3, ge=1, description="message and update blocks, or attention layers")
    num_heads: int = Field(8, ge=1, description="attention heads, of torchmdnet_et; a divisor of hidden_channels")
    cutoff_nm: float = Field(0.5, gt=0, description="interaction cutoff")
    rbf_size: int = Field(20, ge=2, description="radial basis functions")
    vec_channels: int = Field(32, ge=1, description="channels of the vector heads")
    predict_delta: bool = Field(True, description="heads give the whole displacement; false: what free flight lacks")
    max_disp_nm: float = Field(0.15, gt=0, description="bound on the displacement; 8 standard deviations or more")
    use_force_head: bool = Field(False, description="a third head for the forces at the start, an auxiliary target")
    tanh_head: bool = Field(True, description="bound the displacement smoothly")
    use_temperature: bool = Field(False, description="take the temperature as an input")

    def network(self) -> JumpConfig:
        """The same in the units and words of the core."""
        nm = length_unit("nm")
        return JumpConfig(
            arch="painn_jump" if self.arch == "painn" else "torchmdnet_et_jump",
            heads=self.num_heads,
            features=self.hidden_channels,
            interactions=self.num_layers,
            cutoff=self.cutoff_nm * nm,
            basis_size=self.rbf_size,
            vector_features=self.vec_channels,
            from_flight=not self.predict_delta,
            bounded=self.tanh_head,
            max_displacement=self.max_disp_nm * nm,
            forces=self.use_force_head,
            temperature=self.use_temperature,
        )


class JumpTrainConfig(Config):
    """A file for `mlff kstep train --train`."""

    seed: int = Field(0, ge=0, description="of the weights, the order of the pairs and the noise")
    k_steps: list[int] = Field([4], min_length=1, description="k, or several: a curriculum, each from the one before")
    batch_size: int = Field(32, ge=1, description="pairs per forward pass")
    grad_accum: int = Field(1, ge=1, description="forward passes per step of the optimiser")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    lr_min: float = Field(1e-6, ge=0, description="at the end of the cosine schedule")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    epochs: int = Field(100, ge=1, description="passes over the training pairs, for each k")
    amp: bool = Field(False, description="bfloat16 autocast in the network")
    grad_clip: float = Field(10.0, gt=0, description="largest norm of the gradient")
    lambda_vel: float = Field(1.0, ge=0, description="weight of velocities against positions, each in its own spread")
    lambda_com: float = Field(0.1, ge=0, description="weight of the drift of the centre of mass before its projection")
    lambda_force: float = Field(0.1, ge=0, description="weight of the forces, where the model has a head for them")
    noise_nm: float = Field(0.0, ge=0, description="standard deviation of noise on positions at the start of a jump")
    reverse: bool = Field(True, description="train on each pair run backwards too: velocity Verlet is reversible")
    val_every_steps: int = Field(500, ge=1, description="steps of the optimiser between validations")
    checkpoint_every_steps: int = Field(500, ge=1, description="between saves of the resumable state")
    rollout_jumps: int = Field(3, ge=1, description="chained jumps in the rollout metric")

    @field_validator("k_steps", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return [value] if isinstance(value, int) else value

    @field_validator("k_steps")
    @classmethod
    def _rising(cls, value: list[int]) -> list[int]:
        if min(value) < 1 or value != sorted(set(value)):
            raise ValueError("steps above 0, each larger than the one before")
        return value
