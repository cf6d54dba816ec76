"""Networks as pure functions of their params; nothing in this folder knows a trainer."""
