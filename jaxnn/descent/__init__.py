"""Gradient descent, one step at a time: `descent_kernel`, of which `gradient_descent` is fast form.

`jaxnn.gradient_descent` runs whole descents. What stands here is for loops of one's own.
"""

from jaxnn.descent.kernel import Info, Kernel, State, descent_kernel, network_key

__all__ = ["Info", "Kernel", "State", "descent_kernel", "network_key"]
