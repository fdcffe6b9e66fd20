"""What a run tells: numbers as lines of JSON, TensorBoard, a page, a summary, a sample of text.

    metrics  the lines; `sinks` TensorBoard and Weights & Biases
    summary  the last lines; `page` report.html; `sample` text continued

Read `metrics` first.
"""
