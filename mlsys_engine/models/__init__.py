"""Models to start from: plain nn.Modules that know nothing of the engine."""

from mlsys_engine.models.gpt import GPT, GPTConfig, GPTOutput

__all__ = ["GPT", "GPTConfig", "GPTOutput"]
