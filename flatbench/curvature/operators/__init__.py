"""Symmetric operators: Hessians, Gauss-Newton matrices, and the losses behind them."""
