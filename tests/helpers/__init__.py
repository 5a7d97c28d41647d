"""What tests share: small data sets, hostile files, groups of processes."""
