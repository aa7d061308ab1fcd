"""Several adapters as one: how their changes of a weight are combined, method by method.

The results are those of PEFT 0.21's ``add_weighted_adapter`` (``peft/tuners/lora/model.py``,
``peft/utils/merge_utils.py``), with three differences. ``cat`` and the SVD methods take every
additive kind of adapter, not LoRA alone. Where the first adapter is rsLoRA, PEFT scales the result
once more by the square root of the new rank; we do not. And what PEFT drops or ignores (DoRA's
magnitudes, options that a method does not have) is refused.
"""
