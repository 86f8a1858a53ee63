-- A paused sandbox of a draining host is resumed on another one.

alter table sandboxes
  -- While `host_id` is told to bring it up: where its paused copy stays until it runs there.
  add column moving_from text references hosts;
create index sandboxes_moving on sandboxes (moving_from) where moving_from is not null;
