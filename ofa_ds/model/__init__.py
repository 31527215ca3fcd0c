"""OFA on packed batches: `ofa_ds.model.config.preset` names the sizes, `ofa_ds.model.ofa.OFA` is the model."""
