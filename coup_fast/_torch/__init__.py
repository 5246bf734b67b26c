"""What PyTorch makes necessary: frozen parameters, transforms, modules behind callables, locks."""
