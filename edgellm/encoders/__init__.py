"""Encoders (BERT and its kin): converted, opened, and asked for embeddings, labels and words.

``finding`` says whether a source is one, ``conversion`` makes an artifact of it, ``model`` runs it.
"""
