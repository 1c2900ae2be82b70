"""Operations of volumes: each is carried out by one agent, its coordinator, which speaks to the others."""
