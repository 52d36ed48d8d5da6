"""Language models as agents: prompts, context, answers, and the policy that asks a model."""

from tenfold_byzantine.language.policy import LanguagePolicy, from_group
from tenfold_byzantine.language.settings import LanguageSettings

__all__ = ["LanguagePolicy", "LanguageSettings", "from_group"]
