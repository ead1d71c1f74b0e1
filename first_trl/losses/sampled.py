"""The estimator `"sampled"`: draws from the teacher, unbiased for the full KL."""

from .topk import TopK


class Sampled(TopK):
    """
    `"topk"` on the distinct draws, each with its share of the draws. Its gradient is unbiased for the full KL (Anshumann
    et al. 2025, [arXiv 2503.16870](https://huggingface.co/papers/2503.16870)).
    """


SAMPLED = Sampled()
