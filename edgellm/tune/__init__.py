"""Tuning after solving: codes stay, scales, minima and norms move towards the source.

``stored`` reads an artifact's tensors by role and writes them back; ``torch_decoder`` computes a
``Decoder`` in torch; ``weights`` holds what is trained; ``blocks`` trains one decoder block after
another, ``whole`` the network end to end; ``tuning`` does it all and says what came of it. All but
``stored`` need torch (the extra ``calibrate``).
"""
