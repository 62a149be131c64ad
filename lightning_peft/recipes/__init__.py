"""Ready LightningModules and DataModules: images through timm, text through transformers."""

from lightning_peft.recipes.images import DigitsData as DigitsData
from lightning_peft.recipes.images import ImageClassifier as ImageClassifier
from lightning_peft.recipes.text import CausalLM as CausalLM
from lightning_peft.recipes.text import SourceCodeData as SourceCodeData
