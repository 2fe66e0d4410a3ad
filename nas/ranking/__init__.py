"""How well accuracies in shared weights rank architectures: tables of known ones, statistics, comparisons, pictures, truths."""
