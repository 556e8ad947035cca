"""What the fine-tuning recipes are made of: configuration, data, model, checkpoints, logging, loop.

Needs the ``train`` extra: ``pip install 'halo_train[train]'``. Nothing in the core imports it.
"""
