"""What tests share: small bases, adapters, servers, damaged files, and how near is near."""
