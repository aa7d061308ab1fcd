"""LoRA and its kin: adapters read, combined and merged as a lazy transform of the weights.

``reading`` opens adapters, ``kinds`` says what each kind does to a weight, ``combine`` makes one
change of several, ``base`` finds the base that they belong to, ``check`` looks for what is wrong.
``merging`` and ``named_weights`` put them on a model.
"""
