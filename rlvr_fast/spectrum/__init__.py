"""Which prompts carry signal, which are mastered, lucky or out of reach; and a sampler that follows it."""

from rlvr_fast.spectrum.difficulty_spectrum import DifficultySpectrum, difficulty_spectrum
from rlvr_fast.spectrum.mixture import Mixture
from rlvr_fast.spectrum.sampler import SpectrumSampler

__all__ = ["DifficultySpectrum", "Mixture", "SpectrumSampler", "difficulty_spectrum"]
