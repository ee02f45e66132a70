"""The pipeline: corpus, template, training, export, probes. Knows nothing of jobs, web or Gradio."""
