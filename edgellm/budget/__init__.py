"""Grids chosen tensor by tensor for a size: how much each choice is expected to cost, measured."""
