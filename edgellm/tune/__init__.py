"""Tuning: codes are solved by the source's gradients, then scales, minima and norms are trained.

``stored`` reads an artifact's tensors by role and writes them back; ``torch_decoder`` computes a
``Decoder`` in torch; ``weights`` holds what is trained; ``blocks`` trains one decoder block after
another, ``whole`` the network end to end; ``tuning`` does it all and says what came of it. Before
that, ``gradients`` and ``coupling`` give the solver what couples the rows of a weight. All but
``planning``, ``settings`` and ``stored`` need torch (the extra ``calibrate``).
"""
