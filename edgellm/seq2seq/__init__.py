"""Encoders with a decoder (T5, BART): converted, opened, and asked for a text's translation,
summary or answer.

``conversion`` makes an artifact of one, ``model`` runs it.
"""
