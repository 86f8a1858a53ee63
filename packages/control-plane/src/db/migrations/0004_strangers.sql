-- Sandboxes that a host has and no row knows (hosts/strangers.ts): how many the
-- last comparison found, and whether they were too many to touch any.
alter table hosts
  add column strangers integer not null default 0 check (strangers >= 0),
  add column strangers_untouched boolean not null default false;

create index hosts_with_strangers on hosts (id) where strangers > 0;
