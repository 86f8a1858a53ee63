# For login shells: nothing else reads /etc/default/locale here.
export LANG="${LANG:-C.UTF-8}"
