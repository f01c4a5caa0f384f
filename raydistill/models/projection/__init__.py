"""A student that begins with its teacher's weights, cut down to its own architecture.

The teacher's tensors are read one by one (`tensors`, `stream`), cut into pieces whose axes lie in named spaces
(`structure`, `rules`, and a module per family), measured on calibration rows (`measure`), mapped (`maps`, `bases`,
`heads`, `depth`, `kernels`), put into the student (`project`), and accounted for (`reconstruct`, `report`).
"""
