def logical_optimizer(tx, mesh):
    raise NotImplementedError
