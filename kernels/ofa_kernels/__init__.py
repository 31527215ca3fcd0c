"""Operators of OFA on packed tokens. Each public function has its plain-torch reference beside it: that is the CPU path."""
