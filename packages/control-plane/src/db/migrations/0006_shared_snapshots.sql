-- Snapshots on several hosts, and in the object stores that hosts share.

alter table hosts
  -- Memory of which other hosts it can load; null: it did not say.
  add column snapshot_compat text,
  -- The object store that it uses; null: none.
  add column store_id text;

alter table snapshots
  add column compat text,
  -- Object store that has all of it; null: none yet, as far as we know.
  add column store_id text;
create index snapshots_unsent on snapshots (host_id, id) where store_id is null and status = 'ready';

-- Where a snapshot lies, or may lie: written before a host is told to make or
-- fetch it. A row outlives its snapshot until its host has said that it is
-- gone, so what is to be deleted on a silent host is remembered.
create table snapshot_copies (
  snapshot_id text not null,
  host_id text not null references hosts,
  deleting boolean not null default false,
  primary key (snapshot_id, host_id)
);
create index snapshot_copies_by_host on snapshot_copies (host_id, snapshot_id) where deleting;

insert into snapshot_copies (snapshot_id, host_id, deleting)
select id, host_id, status = 'deleting' from snapshots;
