"""Gradient descent, one step at a time: `descent_kernel` is for loops of your own.

`jaxnn.gradient_descent` is its fast form: whole descents, with stop rules and checkpoints.
"""

from jaxnn.descent.gradient_descent import DescentHistory
from jaxnn.descent.kernel import Info, Kernel, State, descent_kernel, network_key

__all__ = ["DescentHistory", "Info", "Kernel", "State", "descent_kernel", "network_key"]
