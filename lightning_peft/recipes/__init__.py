"""Ready modules and data: timm's and transformers' classifiers, diffusers' denoisers, causal language models."""

from lightning_peft.recipes.classification import DocstringsData as DocstringsData
from lightning_peft.recipes.classification import TextClassifier as TextClassifier
from lightning_peft.recipes.denoising import Denoiser as Denoiser
from lightning_peft.recipes.denoising import PicturesData as PicturesData
from lightning_peft.recipes.images import DigitsData as DigitsData
from lightning_peft.recipes.images import ImageClassifier as ImageClassifier
from lightning_peft.recipes.packing import PackedData as PackedData
from lightning_peft.recipes.packing import PackingCollate as PackingCollate
from lightning_peft.recipes.packing import pack as pack
from lightning_peft.recipes.text import CausalLM as CausalLM
from lightning_peft.recipes.text import SourceCodeData as SourceCodeData
from lightning_peft.recipes.text import SourceFunctionsData as SourceFunctionsData
