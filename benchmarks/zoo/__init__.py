"""Small networks trained on real data (Fashion-MNIST), and how they were trained. See README.md in this folder."""
