"""Mathematics without a framework: attention, losses, products. The pipeline and the reference models stand on it.

    attention         `attend`: the entry point, on any mesh
    attention_choice  which implementation, and why
    blockwise         attention that holds no T x T array
    tensor            what the axis `tensor` shares
    losses            cross-entropy, in chunks where logits are large
    products          matrix products and their gradients in the compute dtype
    dtypes            the wider dtype that sums are made in

Read `attention` first.
"""
