"""Pure maths: the model's forward over one step's tensors. A model never sees a request."""
