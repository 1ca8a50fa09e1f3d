"""``gqa-kernels train-demo``: small models trained with uneven groups on real data.

    settings.py   sizes and options
    tasks.py      a decoder on text, a ViT on digits: data, model, measure
    models.py     the transformer both are made of
    methods.py    from a trained MHA model to each way of grouping its heads
    training.py   the training loop and its checkpoints
    report.py     table, JSON and loss curves
    run.py        all of it in order

As in up-training (GQA, arXiv 2305.13245), each seed first trains a model with one KV head per query
head. Every method then starts from that model: its KV heads are mean-pooled by the method's map,
and training continues for the same steps on the same batches.
"""
