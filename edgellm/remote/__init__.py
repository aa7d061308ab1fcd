"""Python of a model's own, which its configs name: never run, unless somebody trusts it.

``finding`` says what would be run and runs nothing. ``tokenizing`` and ``answering`` run it, by
transformers, to compare with: the network that is written is always edgellm's own.
"""
