"""The whole system under one virtual clock, one seed and every fault that the seed asks for."""
