"""Layers: subclasses of the torch.nn classes whose forward is one functional call."""
