"""Results as people read them: tables, pages, comparisons, JUnit XML and Weights & Biases."""
