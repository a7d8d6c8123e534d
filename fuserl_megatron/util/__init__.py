"""Small tools that know nothing of models or data: locks, whole directories."""
